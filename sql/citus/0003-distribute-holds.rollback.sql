DROP FUNCTION apply_account_changes(bigint, text[], bigint[], bigint[], text[], integer[], text[], boolean[], text);

SELECT undistribute_table('open_holds');
