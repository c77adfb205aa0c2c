"""Work that several systems share: training recipes, and studies made of many runs."""
