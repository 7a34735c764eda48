"""Tools around models: counting what they do."""
