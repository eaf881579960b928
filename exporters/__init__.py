"""Ways out for records: one file each, found by entry-point name in the group `tensorspan.exporters`."""
