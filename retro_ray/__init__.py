"""retro_ray: the retrieval-enhanced transformer (RETRO) as software, on Ray."""
