//! The scripts that run at a remote end.
//!
//! The scripts are for a POSIX shell with POSIX programs. Other features that they use (`stat`, `sync` with a name,
//! `-ef`) may be missing. Data are positional arguments only. `$0` is the mark of the connection: `say` prints it before
//! each line of the answer. A script may run twice: if the connection is lost before the answer, the request is repeated.
//! Our own file names are used relative to their directory, which `cd` holds open, and never through a symbolic link.

// Exit codes. The scripts contain them as digits.
pub(super) const ABSENT: i32 = 66;
pub(super) const DENIED: i32 = 77;
pub(super) const EXISTS: i32 = 73;
pub(super) const CHANGED: i32 = 74;
pub(super) const NO_LINKS: i32 = 72;
pub(super) const NO_PROGRAM: i32 = 69;

/// Defines `say`, which prints a line of the answer.
macro_rules! say {
    () => {
        r#"say() { printf "%s %s\n" "$0" "$*"; }; "#
    };
}

/// `absent PATH`: ends the script with the code for a missing path, or for a denied one if a directory above
/// it may not be searched.
macro_rules! absent {
    () => {
        r#"absent() { d=$1; while test -n "$d" && ! test -e "$d"; do d=${d%/*}; done; d=${d:-/}; if test -d "$d" && ! test -x "$d"; then exit 77; fi; exit 66; }; "#
    };
}

/// `plain NAME`: succeeds for a regular file with one name.
macro_rules! plain {
    () => {
        r#"plain() { test -f "$1" && ! test -L "$1" && test "$(ls -ldn "$1" | { read -r m n r; echo "$n"; })" = 1; }; "#
    };
}

/// `clear ./NAME`: removes a directory of checkpoints and only checkpoints in it. For any other entry it
/// removes only the name.
macro_rules! clear {
    () => {
        r#"clear() { if test -d "$1" && ! test -L "$1"; then ( p=$(pwd -P) && cd "$1" && test "$(pwd -P)" = "${p%/}/${1#./}" && rm -f ./bbcp.* ) && rmdir "$1"; else rm -f "$1"; fi; }; "#
    };
}

/// `flush PATH…`: writes files and directories to the disk. `sync` with names is not POSIX: if it takes no
/// names, or may not open them, everything is written. An error of the disk is reported.
macro_rules! flush {
    () => {
        r#"flush() { e=$(sync "$@" 2>&1) || case $e in *"nput/output error"*|*"o space left on device"*|*"uota exceeded"*) echo "$e" >&2; return 1;; *) sync;; esac; }; "#
    };
}

/// $1 path, $2 `keep` if a symbolic link must not be followed. Answers `kind readable boot SIZE DEVICE INODE NAMES
/// MODIFIED CHANGED|MODIFIED|CHANGED`, the times in seconds and as text; `-` stands for an unknown value. Without the
/// `stat` of GNU or busybox, `ls` provides the size.
pub(super) const STAT: &str = concat!(
    say!(),
    absent!(),
    r#"if test "$2" = keep && test -L "$1"; then say "other no - 0 - - - - -"; exit 0; fi; test -e "$1" || absent "$1"; k=other; test -d "$1" && k=directory; test -f "$1" && k=file; r=no; test -r "$1" && r=yes; b=$(cat /proc/sys/kernel/random/boot_id 2>/dev/null); f=$(stat -L -c "%s %d %i %h %Y %Z|%y|%z" "$1" 2>/dev/null) || { set -- $(ls -lndL "$1"); f="$5 - - $2 - -"; }; say "$k $r ${b:--} $f""#
);

/// $1 the location's directory, $2 the one to make below it. A symbolic link on the way is followed
/// only if it belongs to root, to our user or to the owner of its directory. Answers df's last line, as [`DF`].
pub(super) const MKDIR: &str = concat!(
    say!(),
    r#"test -d "$1" || exit 66; owner() { ls -ldn "$1" | { read -r m n u r; echo "$u"; }; }; p=$1; r=${2#"$1"}; while r=${r#/}; test -n "$r"; do c=${r%%/*}; l=$p; p=${p%/}/$c; r=${r#"$c"}; if test -L "$p"; then o=$(owner "$p"); case $o in 0|"$(id -u)"|"$(owner "$l/.")") ;; *) echo "$p is a symbolic link of user $o, which is not followed" >&2; exit 77;; esac; fi; done; "#,
    r#"e=$(mkdir -p "$2" 2>&1) || { echo "$e" >&2; case $e in *": Permission denied"|*": Read-only file system") exit 77;; esac; exit 1; }; test -w "$2" && test -x "$2" || exit 77; say "$(df -P -k "$2" | tail -n 1)""#
);

/// $1 directory. Answers df's last line.
pub(super) const DF: &str = concat!(say!(), r#"say "$(df -P -k "$1" | tail -n 1)""#);

/// $1 directory, $2 name of the copy, $3 final name, $4 name of the copy's checkpoints, $5 `SIZE MODIFIED` of the copy if
/// known; then the directories that are written to the disk. The checkpoints are removed last: without them the copy could not be completed after an error.
pub(super) const RENAME: &str = concat!(
    say!(),
    clear!(),
    flush!(),
    r#"cd "$1" || exit 1; "#,
    r#"copy() { test -f "./$2" && ! test -L "./$2"; }; "#,
    r#"if test -e "./$3" || test -L "./$3"; then copy "$@" && ! test -L "./$3" && test "./$2" -ef "./$3" 2>/dev/null || exit 73; "#,
    r#"else copy "$@" || { echo "$2 is not a regular file" >&2; exit 1; }; if test -n "$5"; then test "$(stat -c "%s %Y" "./$2" 2>/dev/null || echo "$5")" = "$5" || exit 74; fi; flush "./$2" || exit 1; e=$(ln "./$2" "./$3" 2>&1) || { test -e "./$3" && exit 73; echo "$e" >&2; case $e in *"not permitted"|*"not supported"|*"not implemented") exit 72;; *": Permission denied"|*": Read-only file system") exit 77;; esac; exit 1; }; fi; "#,
    r#"rm -f "./$2" || exit 1; clear "./$4" || exit 1; shift 5; flush "$@" || exit 1; say renamed"#
);

/// $1 a file; then the directories that are written to the disk with it.
pub(super) const SYNC: &str = concat!(
    say!(),
    absent!(),
    flush!(),
    r#"test -e "$1" || absent "$1"; flush "$@" || exit 1; say written"#
);

/// $1 directory, $2 name. Makes an empty file; fails if anything else has this name.
pub(super) const MARKER: &str = concat!(
    say!(),
    plain!(),
    r#"cd "$1" || exit 1; if ! plain "./$2" || test -s "./$2"; then set -C; umask 077; : >"./$2" || exit 1; fi; say made"#
);

/// $1 a location's directory. Answers its problem (missing, closed, empty) or `good`. A directory that cannot be listed
/// does not count as empty.
pub(super) const ROOT: &str = concat!(
    say!(),
    r#"if ! test -d "$1"; then say missing; elif ! test -x "$1"; then say closed; elif test -z "$(ls -A "$1" 2>&1 | head -n 1)"; then say empty; else say good; fi"#
);

/// $1 directory, $2 name of the copy, $3 name of its checkpoints. Removes both.
pub(super) const REMOVE: &str = concat!(
    say!(),
    absent!(),
    clear!(),
    r#"cd "$1" 2>/dev/null || absent "$1"; rm -f "./$2" || exit 1; clear "./$3" || exit 1; say removed"#
);

/// $1 directory, $2 name of our copy, $3 name of its checkpoints; then, if an earlier attempt left a copy, $4 its name,
/// $5 name of its checkpoints. Answers the number of bytes of that copy. The copy is renamed last, as at a local end.
pub(super) const ADOPT: &str = concat!(
    say!(),
    plain!(),
    clear!(),
    r#"cd "$1" || exit 1; plain "./$2" || rm -f "./$2" || exit 1; e=; "#,
    r#"if test -n "$4"; then if plain "./$4" && test -d "./$5" && ! test -L "./$5"; then e=$4; clear "./$3" && mv "./$5" "./$3" || exit 1; for f in "./$3"/bbcp.*"$4"; do if test -e "$f"; then mv "$f" "${f%"$4"}$2" || exit 1; fi; done; else rm -f "./$4" && clear "./$5" || exit 1; fi; fi; "#,
    r#"if test -L "./$3" || ! test -d "./$3"; then clear "./$3" && mkdir "./$3" || exit 1; fi; "#,
    r#"if test -n "$e"; then mv "./$e" "./$2" || exit 1; fi; n=0; if plain "./$2"; then set -- $(ls -lnd "./$2"); n=$5; fi; say "$n""#
);

/// $1 directory, $2 transfer id. Lists the transfer's temporaries. The directory may be made at the same time.
pub(super) const LIST: &str = concat!(
    say!(),
    r#"cd "$1" 2>/dev/null || { test -e "$1" && ! test -x "$1" && exit 77; exit 0; }; for f in .ccat-transfer-"$2"-*.part .ccat-transfer-"$2"-*.ckpt; do if test -e "$f" || test -L "$f"; then say "$f"; fi; done; exit 0"#
);

/// $1 path, $2 `keep` if a symbolic link must not be followed, $3 number of bytes that the file must have, $4 number of
/// seconds to wait for them, $5 first mebibyte to read, $6 number of mebibytes to read, $7 `disk` if the file is written to
/// the disk before, so that its digest is not that of bytes that a later error loses; then the program and its
/// arguments, or `auto` for the faster program for SHA-256 that works. Answers `short SIZE` if the file has too few bytes,
/// or `digest`, the name of the program and its output.
///
/// A file that still grows belongs to a copy by bbcp, which withholds the permission to read it, and should not be slowed
/// down. The wait ends if the file is removed. It is in short steps at first, if `sleep` can do that: small files arrive in
/// less than a second.
pub(super) const DIGEST: &str = concat!(
    say!(),
    absent!(),
    r#"f=$1 l=$2 e=$3 t=$4 k=$5 n=$6 d=$7; shift 7; "#,
    r#"if test "$1" = auto; then if openssl dgst -sha256 -r </dev/null >/dev/null 2>&1; then set -- openssl dgst -sha256 -r; else set -- sha256sum; fi; fi; "#,
    r#"command -v "$1" >/dev/null 2>&1 || exit 69; "#,
    r#"check() { if test "$l" = keep && test -L "$f"; then echo "$f is a symbolic link" >&2; exit 1; fi; }; check; "#,
    r#"size() { ls -lnd -L -- "$f" 2>/dev/null | { read -r m n u g s r; echo "${s:-0}"; }; }; "#,
    r#"if test "$e" -gt 0; then w=0 v= b=$(date +%s); while s=$(size); test "$s" -lt "$e"; do test "$(($(date +%s) - b))" -ge "$t" && { say short "$s"; exit 0; }; "#,
    r#"if test -e "$f"; then v=yes; elif test -n "$v"; then say short 0; exit 0; fi; "#,
    r#"w=$((w + 1)); if test "$w" -le 25; then sleep 0.2 2>/dev/null || sleep 1; else sleep 1; fi; done; check; fi; "#,
    r#"test -e "$f" || absent "$f"; if ! test -r "$f"; then test "$l" = keep && chmod u+r "$f" 2>/dev/null; test -r "$f" || exit 77; fi; "#,
    r#"if test "$d" = disk; then x=$(sync -d "$f" 2>&1) || case $x in *"nput/output error"*|*"o space left on device"*|*"uota exceeded"*) echo "$x" >&2; exit 1;; esac; fi; p=${1##*/}; case $p in *" "*) p=program;; esac; if test "$t" -gt 0; then set -- nice -n 10 "$@"; fi; block() { dd if="$f" bs=1048576 skip="$k" count="$n" "$@"; }; "#,
    r#"h=$({ { block 2>/dev/null; echo "read $?" >&3; } | "$@"; } 3>&1) || { echo "$h" >&2; exit 1; }; "#,
    r#"case $h in *"read 0"*) ;; *) block of=/dev/null >&2; exit 1;; esac; h=${h#read 0}; say digest "$p" ${h%read 0}"#
);

/// Prints a line that no output of a login shell equals.
macro_rules! begin {
    () => {
        r#"printf "\n%s begin\n" "$0"; "#
    };
}

/// $1 path. After the first line, prints the content of the file.
pub(super) const READ: &str = concat!(
    begin!(),
    absent!(),
    r#"test -e "$1" || absent "$1"; test -r "$1" || exit 77; exec cat "$1""#
);

/// $1 directory, $2 name, $3 number of bytes. Writes standard input to a new file, with the mode that bbcp gives it. Removes
/// the file if the input has another number of bytes: the sender has ended then.
pub(super) const WRITE: &str = concat!(
    begin!(),
    r#"cd "$1" || exit 1; set -C; exec 3>"./$2" || exit 1; "#,
    r#"cat >&3 && exec 3>&- && n=$(ls -lnd "./$2" | { read -r m l u g s r; echo "$s"; }) || { rm -f "./$2"; exit 1; }; "#,
    r#"test "$n" = "$3" || { rm -f "./$2"; echo "$n bytes of $3 have arrived" >&2; exit 1; }; chmod go-w "./$2""#
);

/// Answers at once.
pub(super) const PING: &str = concat!(say!(), "say pong");

/// Answers the host's clock, in seconds since 1970. POSIX does not define this for `date`, but all systems have it.
pub(super) const CLOCK: &str = concat!(say!(), r#"say "$(date +%s)""#);

/// $1 bbcp. Answers its version.
pub(super) const VERSION: &str = concat!(
    say!(),
    r#"export bbcp_CONFIGFN=/dev/null; command -v "$1" >/dev/null 2>&1 || exit 69; v=$("$1" "-#" 2>&1) || { echo "$v" >&2; exit 1; }; say "$v""#
);

/// $1 a name. Answers the host's own name, its address, the address of $1, and the addresses of client and server in the
/// connection of ssh; `-` stands for an unknown one. `getent` is not POSIX.
pub(super) const ADDRESSES: &str = concat!(
    say!(),
    r#"address() { getent ahosts "$1" 2>/dev/null | { read -r a r; echo "${a:--}"; }; }; n=$(uname -n); set -- "$1" $SSH_CONNECTION; "#,
    r#"say "${n:--} $(address "$n") $(address "$1") ${2:--} ${4:--}""#
);

/// Names below /proc/sys. Answers each with its value.
pub(super) const KERNEL: &str = concat!(
    say!(),
    r#"for f; do say "$f $(cat "/proc/sys/$f" 2>/dev/null)"; done"#
);

/// $1 name, $2 size. Makes a sparse file in a new directory, and answers its path.
pub(super) const MAKE_TRIAL: &str = concat!(
    say!(),
    r#"umask 077; d=${TMPDIR:-/tmp}/$1.d; mkdir "$d" 2>/dev/null || test -O "$d" || exit 1; test -L "$d" && exit 1; "#,
    r#"e=$(dd if=/dev/null of="$d/$1" bs=1 count=0 seek="$2" 2>&1) || { rm -f "$d/$1"; rmdir "$d"; echo "$e" >&2; exit 1; }; say "$d/$1""#
);

/// $1 name. Removes the file of [`MAKE_TRIAL`].
pub(super) const REMOVE_TRIAL: &str = concat!(
    say!(),
    r#"d=${TMPDIR:-/tmp}/$1.d; if test -d "$d" && ! test -L "$d"; then rm -f "$d/$1" && rmdir "$d" || exit 1; fi; say removed"#
);
