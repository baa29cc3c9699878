"""One model on several ranks, whole on each or spread over them."""
