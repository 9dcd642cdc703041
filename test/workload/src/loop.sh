# SPDX-License-Identifier: Apache-2.0
#
# loop.sh SECONDS: keeps bash busy: arithmetic, substitutions, patterns, recursion, and
# subshells, which fork without exec.
echo ready
words=(alpha beta gamma delta epsilon zeta eta theta)

fib() {
	local n=$1
	if ((n < 2)); then
		result=$n
		return
	fi
	local a
	fib $((n - 1))
	a=$result
	fib $((n - 2))
	((result += a))
}

end=$((SECONDS + $1))
while ((SECONDS < end)); do
	fib 9
	text=
	for ((i = 0; i < 200; i++)); do
		w=${words[i % 8]}
		text+="${w^^}-${w//a/o} "
		[[ $w =~ ^(.)(.*)t(.*)$ ]] && text+=${BASH_REMATCH[2]}
		case $w in
		*eta) text=${text#* } ;;
		esac
	done
	sorted=$(for w in ${text:0:300}; do echo "$w"; done)
	x=${#sorted}
done
