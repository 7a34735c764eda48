"""Small parts with no opinion about attention: positions, MLP, embeddings."""
