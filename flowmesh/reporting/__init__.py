"""What a node tells others about its tasks and its peers: webhooks."""
