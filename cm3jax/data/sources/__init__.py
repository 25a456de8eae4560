"""Documents from where pictures and captions live."""
