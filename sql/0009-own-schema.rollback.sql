ALTER FUNCTION apply_changes RESET search_path;
ALTER FUNCTION apply_transfers RESET search_path;
ALTER FUNCTION read_feed RESET search_path;
ALTER FUNCTION read_feed_head RESET search_path;
