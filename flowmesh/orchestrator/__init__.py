"""The node's side of the contract with an orchestrator, over Redis."""
