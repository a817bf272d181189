-- Where the accounts of a file wait until all of them are there, to be opened together: a table of this transaction's own.
CREATE TEMPORARY TABLE imported_accounts (
    line            bigint NOT NULL,
    id              bigint NOT NULL,
    balance         bigint NOT NULL,
    minimum_balance bigint NOT NULL
) ON COMMIT DROP
