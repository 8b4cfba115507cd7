"""The decision core: pure, deterministic, and the same object in a live service and in a simulation.

Nothing in here reads a clock, starts a thread, touches a file or draws a random number. Time is an argument.
"""
