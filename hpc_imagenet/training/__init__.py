"""The one room that knows torch: model, data, sampler, recipe, checkpoints."""

import warnings

# Said while Lightning is imported, about its own code; nobody who reads a log can do anything about it.
warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")
