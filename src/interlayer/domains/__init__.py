"""Fields where networks are used: graphs, images, sound, radio, quantum networks, circuits, hardware, control."""
