"""The optimisation problem as such: the reference that the closed form is held against."""
