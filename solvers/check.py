"""The independent checker: is a placement sound, and what is it worth?

No solver shares this code. It recomputes everything from the problem's arrays.
"""
