"""Commands carried out on `cluster.host`, by ssh; used only if that setting is set."""
