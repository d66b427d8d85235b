"""The one room that knows torch: model, data, sampler, recipe, checkpoints."""
