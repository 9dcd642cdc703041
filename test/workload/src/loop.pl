# SPDX-License-Identifier: Apache-2.0
#
# loop.pl SECONDS: keeps perl busy: hashes, regular expressions, sorting with a block,
# sprintf, recursion, eval.
use strict;
use warnings;

$| = 1;
print "ready\n";

sub tree { my $n = shift; return $n < 2 ? $n : tree($n - 1) + tree($n - 2) }

my $end = time + $ARGV[0];
while (time < $end) {
	my %count;
	my $text = join ' ', map { sprintf 'word-%d abc%x', $_, $_ * 7919 } 1 .. 2000;
	$count{lc $1}++ while $text =~ /(\w+?)-(\d+)/g;
	$text =~ s/([a-f]+)(\d*)/length($1) . $2/ge;
	my @sorted = sort { length $a <=> length $b || $a cmp $b } split / /, $text;
	my $n = tree(15);
	my $m = eval { die { code => $n } } || $@->{code};
	my $packed = pack 'N*', map { hex substr $_, -2 } grep { /^[0-9a-f]{2,}$/ } @sorted;
}
