"""HTTP in processes of its own: what it asks of the engine's goes through one pipe each."""
