"""The engine: pure planning (sequence, block_manager, scheduler, batch) and the device side that carries it out."""
