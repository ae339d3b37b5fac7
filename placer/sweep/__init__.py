"""What-if: a plan for each combination of ranks, nodes, slots, dispatch, cluster and batch size.

Every combination is a cell; a folder holds a file per finished cell, so that a sweep can stop and
go on, and cells can be made by several processes or machines.
"""
