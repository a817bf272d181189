SELECT 1;  -- a constraint that was checked stays so
