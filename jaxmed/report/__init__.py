"""What a stage shows its reader: figures in two themes, and one self-contained HTML page."""
