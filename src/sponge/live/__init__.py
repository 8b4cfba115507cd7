"""The live shell: real sessions, real threads, real CPU quota, driven by the core."""
