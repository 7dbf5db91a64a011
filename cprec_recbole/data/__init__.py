"""RecBole's interactions as arrays: reading, splits, lists gathered on demand, windows."""

NEXT_ITEMS = "next_item_id_list"  # our column: the target at each position of a window, [B, L]
