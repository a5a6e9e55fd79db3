"""Pictures: through a VAE, to a GPU and back, and past both when nothing has changed."""
