-- In a schema of its own a function looks for its tables there, whatever the search path of its caller is.
-- depends: 0006-openings 0008-feed-index

DO $$
DECLARE
    name text;
BEGIN
    IF current_schema() = 'public' THEN
        RETURN;
    END IF;
    FOREACH name IN ARRAY ARRAY['apply_changes', 'apply_transfers', 'read_feed', 'read_feed_head'] LOOP
        EXECUTE format('ALTER FUNCTION %I SET search_path TO %I', name, current_schema());
    END LOOP;
END
$$;
