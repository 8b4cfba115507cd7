"""Other people's policies as controllers; what they decide can be served live or simulated."""
