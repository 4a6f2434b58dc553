import com.zaxxer.hikari.HikariConfig;
import com.zaxxer.hikari.HikariDataSource;
import java.io.IOException;
import java.io.PrintStream;
import java.sql.Connection;
import java.sql.PreparedStatement;
import java.sql.SQLException;
import java.time.Instant;
import java.util.ArrayList;
import java.util.List;

/** HikariCP over pgjdbc: all hosts, the primary wanted, with the time-outs that HikariCP's "Rapid Recovery" asks for. */
public final class Load {
    private static final long PAUSE_MILLIS = 100;
    /** A worker that hangs does not keep the process: it ends this long after its input did. */
    private static final long GRACE_MILLIS = 1000;

    private static volatile boolean stop;

    public static void main(String[] arguments) throws Exception {
        int workers = Integer.parseInt(env("BENCH_WORKERS"));
        HikariDataSource pool = new HikariDataSource(config(workers));
        fill(pool, workers);
        say("ready");
        List<Thread> threads = new ArrayList<>();
        for (int worker = 0; worker < workers; worker++) {
            int number = worker;
            Thread thread = new Thread(() -> work(pool, number));
            thread.setDaemon(true);
            thread.start();
            threads.add(thread);
        }
        waitForEndOfInput();
        stop = true;
        long end = System.currentTimeMillis() + GRACE_MILLIS;
        for (Thread thread : threads) {
            thread.join(Math.max(1, end - System.currentTimeMillis()));
        }
        System.out.flush();
        Runtime.getRuntime().halt(0);
    }

    private static HikariConfig config(int workers) {
        String name = System.getenv().getOrDefault("BENCH_NAME", "");
        String servers = name.isEmpty() ? env("BENCH_HOSTS") : name + ":" + env("BENCH_PORT");
        HikariConfig config = new HikariConfig();
        config.setJdbcUrl("jdbc:postgresql://" + servers + "/" + env("BENCH_DATABASE"));
        config.setUsername(env("BENCH_USER"));
        config.setPassword(System.getenv().getOrDefault("BENCH_PASSWORD", ""));
        config.setMaximumPoolSize(workers);
        config.addDataSourceProperty("targetServerType", "primary");
        config.addDataSourceProperty("tcpKeepAlive", "true");
        // Seconds. The first three bound what should take milliseconds; the last is the least that HikariCP recommends.
        config.addDataSourceProperty("connectTimeout", "2");
        config.addDataSourceProperty("loginTimeout", "2");
        config.addDataSourceProperty("cancelSignalTimeout", "2");
        config.addDataSourceProperty("socketTimeout", "30");
        return config;
    }

    /** HikariCP fills itself in the background; the load begins with a full pool. */
    private static void fill(HikariDataSource pool, int workers) throws SQLException {
        List<Connection> held = new ArrayList<>();
        for (int worker = 0; worker < workers; worker++) {
            held.add(pool.getConnection());
        }
        for (Connection connection : held) {
            connection.close();
        }
    }

    private static void work(HikariDataSource pool, int worker) {
        long pace = Long.parseLong(System.getenv().getOrDefault("BENCH_PACE_MS", "0"));
        String sql = "INSERT INTO " + env("BENCH_TABLE") + " (id) VALUES (?)";
        for (long counter = 0; !stop; ) {
            String id = env("BENCH_PREFIX") + "-" + worker + "-" + counter;
            try {
                insert(pool, sql, id);
                say("ok " + micros() + " " + worker + " " + id);
                counter++;
                pause(pace);
            } catch (SQLException | RuntimeException error) {
                say("err " + micros() + " " + worker + " " + id + " " + line(error));
                pause(PAUSE_MILLIS);
            }
        }
    }

    private static void insert(HikariDataSource pool, String sql, String id) throws SQLException {
        try (Connection connection = pool.getConnection();
                PreparedStatement statement = connection.prepareStatement(sql)) {
            statement.setString(1, id);
            statement.executeUpdate();
        }
    }

    private static void pause(long millis) {
        if (millis == 0) {
            return;
        }
        try {
            Thread.sleep(millis);
        } catch (InterruptedException interrupted) {
            Thread.currentThread().interrupt();
        }
    }

    private static void waitForEndOfInput() throws IOException {
        byte[] buffer = new byte[4096];
        while (System.in.read(buffer) >= 0) {
            // Nothing is asked of a peer but to go on.
        }
    }

    private static String line(Exception error) {
        String text = (error.getClass().getSimpleName() + ": " + error.getMessage()).replaceAll("\\s+", " ");
        return text.substring(0, Math.min(300, text.length()));
    }

    private static long micros() {
        Instant now = Instant.now();
        return now.getEpochSecond() * 1_000_000 + now.getNano() / 1000;
    }

    private static void say(String line) {
        PrintStream output = System.out;
        synchronized (output) {
            output.print(line + "\n");
            output.flush();
        }
    }

    private static String env(String name) {
        String value = System.getenv(name);
        if (value == null) {
            throw new IllegalStateException(name + " is not set");
        }
        return value;
    }
}
