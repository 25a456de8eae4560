"""The device mesh and every named sharding."""
