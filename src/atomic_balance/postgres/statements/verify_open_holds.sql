-- Stream the list of open holds, account by account, for the audit.
SELECT user_id, hold_id, amount
  FROM open_holds
 ORDER BY user_id, hold_id
