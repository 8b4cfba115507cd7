"""sponge inside the service that you have: ASGI (Starlette, FastAPI), gRPC, the Open Inference Protocol.

Nothing in sponge imports these modules; each needs only the package of its own extra.
"""
