"""From a source to a cleaned set of documents: checked, resized, filtered, without duplicates."""
