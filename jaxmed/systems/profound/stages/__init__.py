"""One file per stage of ProFound."""
