"""Language steering: find the latent that changes the language a model writes, steer with it, and prove it."""
