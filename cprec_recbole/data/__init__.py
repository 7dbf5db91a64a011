"""RecBole's interactions as arrays, and the rows and windows that are made of them on demand."""

NEXT_ITEMS = "next_item_id_list"  # a column: the target at each position, [B, L]; 0 is padding
