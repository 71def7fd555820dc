"""What papers do with the inside of a language model, on the hook points of `opt_jax.model.interventions`."""
