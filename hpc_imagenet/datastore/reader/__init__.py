"""Read single images of a version by address."""
