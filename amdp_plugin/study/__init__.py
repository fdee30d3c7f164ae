"""What a schedule does to a model's loss, found out on one device before a cluster is paid for."""
