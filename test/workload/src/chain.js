// SPDX-License-Identifier: Apache-2.0
//
// chain.js SECONDS: JavaScript that burns CPU behind known calls, long enough for all
// tiers of the compiler. Node is to be started with --perf-basic-prof, for names, and
// --interpreted-frames-native-stack. Known stacks, below turn:
//
//	outer > middle > inner > leafPlain
//	sorting > (built-in) > order > leafSort
//	walk (15 times) > leafWalk
'use strict';

let sink = 0;

function leafPlain(n) {
	let x = n;
	for (let i = 0; i < n; i++) x = (Math.imul(x, 1103515245) + 12345) | 0;
	return x;
}
function leafSort(n) {
	let x = n;
	for (let i = 0; i < n; i++) x = (Math.imul(x, 1664525) + 1013904223) | 0;
	return x;
}
function leafWalk(n) {
	let x = n;
	for (let i = 0; i < n; i++) x = (Math.imul(x, 22695477) + 1) | 0;
	return x;
}

function inner(n) { return leafPlain(n) + 1; }
function middle(n) { return inner(n) + 1; }
function outer(n) { return middle(n) + 1; }

function order(a, b) { sink += leafSort(300); return a - b; }
function sorting(n) {
	const v = [];
	for (let i = 0; i < n; i++) v.push((Math.imul(i, 7919) >>> 0) % 1009);
	return v.sort(order)[0];
}

function walk(level, n) { return level === 1 ? leafWalk(n) : walk(level - 1, n) + 1; }

function turn() {
	sink += outer(100000);
	sink += sorting(100);
	sink += walk(15, 100000);
}

console.log('ready');
const end = Date.now() + 1000 * Number(process.argv[2]);
while (Date.now() < end) turn();
