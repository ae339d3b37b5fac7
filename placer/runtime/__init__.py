"""Plans applied to real models across processes: loading, dispatch, generation, launching."""
