"""Names of the columns that this package adds to RecBole's."""

NEXT_ITEMS = "next_item_id_list"  # the target at each position of a window, [B, L]; 0 is padding
