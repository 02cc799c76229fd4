"""One file for each publisher or layout of raw files. An importer never imports another one."""
