"""Settings as users write them: overrides, stored settings, notations, and the errors about them."""
