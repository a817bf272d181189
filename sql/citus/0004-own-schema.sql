-- In a schema of its own a function looks for its tables there, whatever the search path of its caller is.
-- depends: 0003-distribute-holds

DO $$
BEGIN
    IF current_schema() <> 'public' THEN
        EXECUTE format('ALTER FUNCTION apply_account_changes SET search_path TO %I', current_schema());
    END IF;
END
$$;
