"""Other programs: reading what serving engines record, writing what they load."""
