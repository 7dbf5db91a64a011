"""What a compressed model does outside RecBole: recommend, take new items, be exported."""
