SELECT undistribute_table('users');

SELECT undistribute_table('balance_changes');
