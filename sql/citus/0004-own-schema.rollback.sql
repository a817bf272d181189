ALTER FUNCTION apply_account_changes RESET search_path;
