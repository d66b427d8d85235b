"""What runs on a node: the task of a job, what it records, and the message that it sends."""
