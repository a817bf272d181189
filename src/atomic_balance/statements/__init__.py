"""The runtime statements, one file each, with their purpose on top."""
