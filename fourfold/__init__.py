"""What the four parts share: `runtime` below them, `claims`, `report` and `cli` above them."""
